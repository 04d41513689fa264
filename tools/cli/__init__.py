"""tools/cli"""
