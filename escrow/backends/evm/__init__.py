"""escrow/backends/evm"""
