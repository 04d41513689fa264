"""escrow/backends"""
