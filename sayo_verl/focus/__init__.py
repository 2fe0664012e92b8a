"""The anchoring stage of ``attn_faithful``: a ``<Focus>`` token learns to look at annotated regions.

Paper: "Faithful Multimodal Reasoning via Anchoring and Reinforcing Visual Attention" (Faithful-MR1), arXiv 2605.22072.
Only its abstract is public. Token, loss and data are our reading (docs/anchoring.md).

- ``config``: settings of the steps
- ``token``: ``<Focus>`` in tokenizer, model and chat template
- ``loss``: attention of the ``<Focus>`` row with its graph, target distribution, KL
- ``rows``: parquet rows to teacher-forced batches
- ``trainer``: a transformers ``Trainer`` with that loss; LoRA; export
- ``respond``: targets from the policy's own right answers
- ``report``: figures and picture before and after
- ``job``: the values of a job, from its file and the command line
- ``variables``: variables that its scripts refuse
- ``run``: checks, plan and steps of a job

``sayo focus --help``
"""
