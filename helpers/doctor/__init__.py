"""The doctor: what a traceback, a post, an exception or a model shows about the dtype error.

The part that reads text needs nothing but the standard library, from Python 3.9 on.
"""
