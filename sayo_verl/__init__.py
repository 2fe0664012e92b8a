"""sayo-verl: credit assignment by visual attention for stock verl.

Importing this package imports neither torch nor verl; the doors are ``sayo_verl.plugin`` (what verl loads),
``sayo_verl.main_ppo`` (the launcher) and the ``sayo`` command.
"""

__version__ = "0.1.0"
