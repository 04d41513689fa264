// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";

import {Collector} from "./Collector.sol";
import {IDepositCollector} from "./IPaymentChannels.sol";

/// @notice The part of EIP-3009 by which a payee takes what was authorised, with one `bytes` signature.
interface IReceiveWithAuthorization {
    function receiveWithAuthorization(
        address from,
        address to,
        uint256 value,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 nonce,
        bytes calldata signature
    ) external;
}

/// @title Brings deposits by EIP-3009
/// @notice `collectorData` is `(uint256 validAfter, uint256 validBefore, uint256 salt, bytes signature)`. The
/// authorisation's nonce is `keccak256(abi.encode(channelId, salt))`, so that it is good for one channel.
contract ERC3009Collector is Collector {
    using SafeERC20 for IERC20;

    constructor(address channels_) Collector(channels_) {}

    /// @inheritdoc IDepositCollector
    function collect(address payer, address token, uint256 amount, bytes32 channelId, bytes calldata collectorData)
        external
        onlyChannels
    {
        (uint256 validAfter, uint256 validBefore, uint256 salt, bytes memory signature) =
            abi.decode(collectorData, (uint256, uint256, uint256, bytes));
        IReceiveWithAuthorization(token)
            .receiveWithAuthorization(
                payer,
                address(this),
                amount,
                validAfter,
                validBefore,
                keccak256(abi.encode(channelId, salt)),
                signature
            );
        IERC20(token).safeTransfer(msg.sender, amount);
    }
}
