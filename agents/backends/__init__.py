"""agents/backends"""
