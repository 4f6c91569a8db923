"""Evaluation protocols, one a file, all on features and labels already in memory.

`features` is the only module here that runs a backbone. Each protocol is a function of arrays,
so that it works on features from anybody's model.
"""
