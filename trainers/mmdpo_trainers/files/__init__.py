"""Files that survive a kill: written whole, appended to in whole lines, locked, hashed. No record's meaning is known here.

Imported by everything above; imports errors alone.
"""
