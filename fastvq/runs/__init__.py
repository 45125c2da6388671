"""Uses of a trained run: load, encode, decode, sample, reconstruct, evaluate, learn a prior, compare priors, plot.

trained.py        `fastvq.load`: the models of a run as one object
load.py           model and prior of a run      train_prior.py      a run's prior, trained on its indices
indices.py        a run's examples as indices    compare_priors.py   the kinds of priors after equal time
contrast.py       a run's contrastive model of images and captions, and the order it gives samples
encode.py         examples or arrays to a file   sample.py           samples in files
decode.py         a file to examples or arrays   sample_pictures.py  samples, completions and neighbors drawn
tokenize.py       a whole data set as arrays of indices
reconstruct.py    examples beside their reconstructions
evaluate.py       a run measured on examples: quality, bits, use of the codebook, with intervals
judge.py          samples of the prior judged   classifier.py   the classifier that judges them
pictures.py       a run's curves, usage and reconstructions
plots.py          the figures themselves
export.py         a run's model as ONNX files
run_list.py       the runs in a folder, with their figures
run_page.py       the page of a run             page.py             pages of sections, also the demo's
"""
