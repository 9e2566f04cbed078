"""Files that survive a crash: temporary files renamed into place, with checksums and locks.

`foreign_files` reads other people's files (`.pt`, safetensors, JSON) and executes nothing; `hub_access` is the Hub.
"""
