"""agents/compute"""
