"""Where a model looks while it answers: exact attention maps of any supported model, without verl.

- ``prompt``: a row, or an image and a question, as the model's input
- ``observe``: ``Observer``: loads a model, answers, measures
- ``collect``: one layer's queries and keys to masses, maps and a table of heads
- ``sinks``: visual tokens that draw attention whatever the question is
- ``answer``, ``vllm_answers``: which engine answers
- ``command``: ``sayo look``
"""
