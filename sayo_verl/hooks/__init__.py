"""Every place where the plug-in hooks into verl. Nothing outside this room and ``models`` changes what verl does.

- ``contract``: every private name of verl that is used, with its reason; guards
- ``engine``, ``capture``, ``counterfactual``: in the workers, around the log-prob pass
- ``modes``, ``trainer``, ``store``, ``estimator``: in the task runner, around the advantages
- ``cpu``: verl without an accelerator
"""
