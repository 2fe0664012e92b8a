"""All hooks into verl. Nothing outside this package and ``models`` changes what verl does.

- ``contract``: every private name of verl in use, with its reason; repairs of verl
- ``engine``, ``capture``, ``counterfactual``: in the workers, around the log-prob pass
- ``modes``, ``trainer``, ``store``, ``estimator``: in the task runner, around the advantages
- ``cpu``: verl without an accelerator
"""
