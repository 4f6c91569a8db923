"""Evaluation of frozen features, in three layers: measures < figures < protocols.

A measure, `sslkit.evaluation.knn` for instance, is functions of arrays: it works on features from
anybody's model and needs neither a model nor matplotlib. `figures` draws what measures return.
`protocols` holds the evaluations of the command ``sslkit evaluate``, each with its
measure's name: its `evaluate` takes a `subject.Subject`, one model on one data set.

`encoders` says what a model must give, `tokens` asks it for that, `features` does so for all images
of a source, `feature_store` and `feature_cache` keep the result, and nothing else runs a model.
"""
