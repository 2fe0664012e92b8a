"""The CPU as a platform of verl, which verl does not ship. Active only with ``VERL_PLATFORM=cpu``."""
