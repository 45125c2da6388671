"""Uses of a trained run: load, encode, decode, sample, reconstruct, evaluate, learn a prior, compare priors, plot.

trained.py        `fastvq.load`: the models of a run as one object
load.py           model and prior of a run      train_prior.py      a run's prior, trained on its indices
indices.py        a run's images as indices     compare_priors.py   the kinds of priors after equal time
encode.py         images or arrays to a file    sample.py           samples in files
decode.py         a file to images or arrays    sample_pictures.py  samples, completions and neighbors drawn
reconstruct.py    images beside their reconstructions
evaluate.py       a run measured on images: quality, bits, use of the codebook, with intervals
measures.py       the measures of images, or why they cannot be taken
pictures.py       a run's curves, usage and reconstructions
plots.py          the figures themselves
export.py         a run's model as ONNX files
run_list.py       the runs in a folder, with their figures
run_page.py       the page of a run             page.py             pages of sections, also the demo's
"""
