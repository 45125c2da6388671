"""Demo on the shipped images: train, learn a prior, sample, compress, and show the results on one page.

run.py          the demo from start to end        sizes.py   the held-out images as files of every format
classifier.py   a judge of samples                page.py    index.html
"""
