"""Whose grades are which: drafters of one session have grades of their own.

So whoever learns how often the guesses of a grade are right learns it of each drafter.
"""

LOOKUP, NGRAM, MODEL = 0, 5, 10  # the first of each
