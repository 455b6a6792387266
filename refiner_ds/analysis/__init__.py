"""What trained models do inside; each command writes a picture and the numbers behind it. Training never imports this.

python -m refiner_ds.analysis features MODEL… --data SET     how features evolve through depth (Figures 2 and 4)
python -m refiner_ds.analysis maps MODEL… --data SET         what maps are like, and a picture of them (Figure 5)
    python -m refiner_ds.analysis weights RUN                    learned kernels and head mixing, at one or many steps

loading.py    a model and the images it is shown        cka.py        similarity of features
features.py   feature evolution                         map_statistics.py   what maps are like
results.py    CSV and PNG beside each other
"""
