"""The command ``cheapertraining``: thin over ``train.py`` and the tools; imports nothing heavy before it must."""
