"""What training in several processes needs: batches dealt out, weights gathered, everything in one forward of the root.

Imported by the rest of training.
"""
