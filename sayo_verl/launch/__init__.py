"""All that happens before a run: settings, checks of model, data, reward and memory, the plan."""
