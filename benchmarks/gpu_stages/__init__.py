"""The stages of `benchmarks.gpu` and `benchmarks.gpu_study`, each in its own processes.

case.py         the cases of a stage, and the process that works through them
run.py          the parent: deadlines, restarts, the report on disk
machine.py      versions and the card's limits
suite.py        the tests marked `gpu`
compiled.py     compilation of networks and losses in advance
exact.py        every kernel against fp64
timing.py       how a call is timed, and its floor
times.py        augmentation, losses, heads and optimisers, next to their peers
steps.py        whole training steps
today.py        the pipeline commonly used
decode.py       from JPEGs to crops, by each decoder
ranks.py        two ranks on one device
study.py        pretraining, probes and fine-tuning on CIFAR-10
images.py       images, if none are given
predictions.py  predictions next to measurements
"""
