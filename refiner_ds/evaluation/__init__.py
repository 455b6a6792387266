"""Evaluation suites: every figure of a set in one pass over it, the same for any number of processes.

    python -m refiner_ds.evaluate MODEL --data SET …      accuracy over one set or several
    python -m refiner_ds.calibrate MODEL                  the crop ratio that fits the receptive field

sets.py          ImageNet and its variants: sizes, class lists, which class is which
predictions.py   one pass: what the model says about every image, gathered from all processes
metrics.py       from that to accuracy, intervals, calibration error, classes, confusions; NumPy alone
corruptions.py   ImageNet-C, made while images are loaded
calibration.py   a sweep of crop ratios
results.py       JSON, and CSV in timm's columns
"""
