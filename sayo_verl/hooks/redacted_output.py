"""verl's printed configuration without secrets.

``verl.trainer.main_ppo`` prints Ray's settings in the launcher, and the whole resolved configuration in the task
runner. Both go to train.log. What verl passes to trackers such as W&B is not changed.
"""

import pprint
from types import ModuleType
from typing import Any

from sayo_verl.redact import redact, redact_values


def redact_prints(main_ppo: ModuleType) -> None:
    """Let ``print`` and ``pprint`` of ``verl.trainer.main_ppo`` write no secret.

    Args:
        main_ppo: the module, just imported. Its own names hide the built-in ones.
    """

    def print_redacted(*values: Any, **kwargs: Any) -> None:
        print(*(redact(str(value)) for value in values), **kwargs)

    def pprint_redacted(value: Any, *args: Any, **kwargs: Any) -> None:
        pprint.pprint(redact_values(value), *args, **kwargs)

    main_ppo.__dict__.update(print=print_redacted, pprint=pprint_redacted)
