"""The stages of `benchmarks.gpu` and `benchmarks.gpu_study`, each in processes of its own.

case.py         what a stage consists of, and the process that works through it
run.py          the parent: deadlines, restarts, the report on the disk
machine.py      versions and ceilings
suite.py        the tests marked `gpu`
compiled.py     networks and losses compiled beforehand
exact.py        every kernel against fp64
timing.py       how a call is timed, and what its floor is
times.py        augmentation, losses, heads, optimisers beside their peers
steps.py        whole training steps
today.py        the pipeline that people have today
decode.py       from JPEGs to crops, by each decoder
ranks.py        two ranks on one device
study.py        pretraining, probes and fine-tuning on CIFAR-10
images.py       images where none are given
predictions.py  what was expected, beside what was measured
"""
