"""A CPU platform for verl, which has none of its own. Active only with ``VERL_PLATFORM=cpu``."""
