"""Where a model looks while it answers: exact attention maps of any supported model, without verl.

- ``prompt``: a row, or an image and a question, as the model's input
- ``loaded``: a model, its prompts and its answers
- ``measure``: statistics of a response, without a page
- ``observe``: ``Observer``: where the model looked, for a page
- ``collect``: one layer's queries and keys to masses, maps and a table of heads
- ``sinks``: visual tokens that draw attention whatever the question is
- ``answer``, ``vllm_answers``: which engine answers
- ``command``: ``sayo look``
"""
