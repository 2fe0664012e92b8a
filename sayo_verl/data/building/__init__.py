"""From examples to folders of rows: options, worker processes, shards, interruptions, mixing."""
