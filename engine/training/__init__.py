"""Training: `python -m engine train`, configured by Hydra with the keys of the official implementation.

The command line is composed into groups (`schema`, `experiments`), checked and made into a plain dataclass
(`run`), and carried out.
"""
