"""From a chat file to a served adapter: the commands `lorafamily train`, `generate` and `evaluate`.

`pip install "lorafamily[chat]"`; nothing here is imported by `import lorafamily`.
"""
