"""The processes of a launch: who they are, how they wait for each other and share work, and progress that people see.

Imported by everything above; imports files and errors.
"""
