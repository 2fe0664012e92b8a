"""What verl needs in order to train a model family that it does not know, one family per module, inert for the others.

``sayo_verl.plugin`` calls ``activate`` of each adapter in every process, so those modules import nothing heavy; what a
family needs of transformers is imported when a model of that family is loaded.
"""
