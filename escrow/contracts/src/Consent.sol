// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {SignatureChecker} from "@openzeppelin/contracts/utils/cryptography/SignatureChecker.sol";

/// @title Whether somebody signed something that an escrow understands
library Consent {
    bytes32 private constant DOMAIN_TYPEHASH =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");

    /// @notice Whether `signer` signed `digest`.
    /// @dev ECDSA comes before ERC-1271, or an account whose delegated code (EIP-7702) knows no
    /// ERC-1271 could never sign.
    function isBy(address signer, bytes32 digest, bytes calldata sig) internal view returns (bool) {
        (address recovered, ECDSA.RecoverError fault,) = ECDSA.tryRecoverCalldata(digest, sig);
        if (fault == ECDSA.RecoverError.NoError && recovered == signer) return true;
        return signer.code.length > 0 && SignatureChecker.isValidERC1271SignatureNowCalldata(signer, digest, sig);
    }

    /// @notice What is signed of `structHash` in the domain of `escrow`, by somebody who is not it.
    function digestFor(address escrow, bytes32 structHash) internal view returns (bytes32) {
        bytes32 separator = keccak256(
            abi.encode(DOMAIN_TYPEHASH, keccak256("Coase JobEscrow"), keccak256("1"), block.chainid, escrow)
        );
        return MessageHashUtils.toTypedDataHash(separator, structHash);
    }
}
