// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";

import {Collector} from "./Collector.sol";
import {IDepositCollector} from "./IPaymentChannels.sol";
import {ISignatureTransfer} from "./Permit2.sol";

/// @title Brings deposits by Permit2
/// @notice `collectorData` is `(uint256 nonce, uint256 deadline, bytes permit2Signature, bytes permit)`. The
/// witness of the Permit2 signature is `DepositWitness(bytes32 channelId)`, so that it is good for one
/// channel. `permit` is empty or an EIP-2612 permit `(uint256 value, uint256 deadline, uint8 v, bytes32 r,
/// bytes32 s)` by which the payer first lets Permit2 draw from him.
contract Permit2Collector is Collector {
    ISignatureTransfer public constant PERMIT2 = ISignatureTransfer(0x000000000022D473030F116dDEE9F6B43aC78BA3);
    bytes32 public constant WITNESS_TYPEHASH = keccak256("DepositWitness(bytes32 channelId)");
    string public constant WITNESS_TYPE =
        "DepositWitness witness)DepositWitness(bytes32 channelId)TokenPermissions(address token,uint256 amount)";

    constructor(address channels_) Collector(channels_) {}

    /// @inheritdoc IDepositCollector
    function collect(address payer, address token, uint256 amount, bytes32 channelId, bytes calldata collectorData)
        external
        onlyChannels
    {
        (uint256 nonce, uint256 deadline, bytes memory signature, bytes memory permit) =
            abi.decode(collectorData, (uint256, uint256, bytes, bytes));
        if (permit.length > 0) _allow(payer, token, permit);
        PERMIT2.permitWitnessTransferFrom(
            ISignatureTransfer.PermitTransferFrom(
                ISignatureTransfer.TokenPermissions(token, amount), nonce, deadline
            ),
            ISignatureTransfer.SignatureTransferDetails(msg.sender, amount),
            payer,
            keccak256(abi.encode(WITNESS_TYPEHASH, channelId)),
            WITNESS_TYPE,
            signature
        );
    }

    /// @dev Somebody may have sent the permit before us; then it fails here and has done its work.
    function _allow(address payer, address token, bytes memory permit) private {
        (uint256 value, uint256 deadline, uint8 v, bytes32 r, bytes32 s) =
            abi.decode(permit, (uint256, uint256, uint8, bytes32, bytes32));
        try IERC20Permit(token).permit(payer, address(PERMIT2), value, deadline, v, r, s) {} catch {}
    }
}
