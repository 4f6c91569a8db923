"""Evaluation protocols, one a file: functions of features and labels, and a thin command each.

`encoders` says what a model must give, `tokens` asks it for that, `features` and `feature_cache` do
so for all images of a source, and nothing else runs a model. A protocol's functions take arrays, so
that they work on features from anybody's model; its `evaluate` takes a `subject.Subject`, one model
on one data set, for ``sslkit evaluate``.
"""
