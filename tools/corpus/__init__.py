"""Corpora of many texts: reading them one by one, scoring them by any engine, results that outlive a run.

`texts` has what the others speak of; `readers` give it, an engine of `engines` scores it, `joining` puts it
back into order, `results` and `lines` keep it.
"""
