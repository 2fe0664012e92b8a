"""The launcher's configuration; a package so that hydra finds it as ``pkg://sayo_verl.config``."""
