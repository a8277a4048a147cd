"""Property tests draw the same examples in every run; to search further: ``pytest --hypothesis-profile=search``."""

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("search", deadline=None, max_examples=3000)
settings.load_profile("same")
