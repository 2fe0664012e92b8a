"""Model families: facts about each, and adapters for those that verl does not support.

``sayo_verl.plugin`` calls ``activate`` of each adapter in every process, so these modules import little. Parts of
transformers are imported when a model of the family is loaded.
"""
