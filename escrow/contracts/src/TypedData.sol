// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title EIP-712 without anything that a constructor would have to remember
/// @notice The code of such a contract works wherever it stands, also where a development chain put it
/// into its first block without running a constructor.
abstract contract TypedData {
    bytes32 private constant DOMAIN_TYPEHASH =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");

    /// @dev Name and version of the domain.
    function _domain() internal pure virtual returns (string memory name, string memory version);

    /// @notice The domain, as EIP-5267 tells it.
    function eip712Domain()
        external
        view
        returns (
            bytes1 fields,
            string memory name,
            string memory version,
            uint256 chainId,
            address verifyingContract,
            bytes32 salt,
            uint256[] memory extensions
        )
    {
        (name, version) = _domain();
        (fields, chainId, verifyingContract) = (hex"0f", block.chainid, address(this));
        (salt, extensions) = (bytes32(0), new uint256[](0));
    }

    function _separator() internal view returns (bytes32) {
        (string memory name, string memory version) = _domain();
        return keccak256(
            abi.encode(
                DOMAIN_TYPEHASH, keccak256(bytes(name)), keccak256(bytes(version)), block.chainid, address(this)
            )
        );
    }

    function _digest(bytes32 structHash) internal view returns (bytes32) {
        return keccak256(abi.encodePacked(hex"1901", _separator(), structHash));
    }
}
