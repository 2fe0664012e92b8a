"""Platforms that verl does not ship, each in its own module and active only when ``VERL_PLATFORM`` names it."""
