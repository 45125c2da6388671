import functools

from fastvq import reference

from .search import search

residual_search = functools.partial(reference.residual_search, search=search)
