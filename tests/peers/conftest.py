"""Transformers' own tests are collected by `make test-peers` alone, which fetches them."""

import os


collect_ignore = [] if "LLADAMEDV_PEERS" in os.environ else ["test_transformers_mixins.py"]
