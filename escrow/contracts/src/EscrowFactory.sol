// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Create2} from "@openzeppelin/contracts/utils/Create2.sol";

import {JobEscrow} from "./JobEscrow.sol";

/// @title One escrow per token, at an address that follows from the token
/// @notice Deploys, and says what it deployed. It has no power over an escrow.
contract EscrowFactory {
    /// @notice Whether this factory deployed the contract at that address.
    mapping(address escrow => bool) public isEscrow;

    event EscrowDeployed(address indexed token, address indexed escrow);

    /// @notice Deploys the token's escrow, or finds it deployed already.
    function deploy(address token) external returns (address escrow) {
        escrow = escrowOf(token);
        if (isEscrow[escrow]) return escrow;
        isEscrow[escrow] = true;
        emit EscrowDeployed(token, escrow);
        new JobEscrow{salt: 0}(token);
    }

    /// @notice Where the token's escrow is, or will be: see `isEscrow`.
    function escrowOf(address token) public view returns (address) {
        return Create2.computeAddress(
            0, keccak256(abi.encodePacked(type(JobEscrow).creationCode, abi.encode(token)))
        );
    }
}
