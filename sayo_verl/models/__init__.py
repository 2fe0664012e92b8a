"""Model families: what the plug-in knows of each, and what verl needs to train those that it does not know.

``sayo_verl.plugin`` calls ``activate`` of each adapter in every process, so these modules import nothing heavy. What a
family needs of transformers is imported when a model of that family is loaded.
"""
