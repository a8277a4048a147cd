"""Models declared with ``wasat.nn`` that come with Wasat."""
