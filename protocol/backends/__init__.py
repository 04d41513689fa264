"""protocol/backends"""
