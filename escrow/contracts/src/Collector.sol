// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IDepositCollector} from "./IPaymentChannels.sol";

/// @title What all collectors have in common
/// @notice What a payer signs names the collector, and the collector hands on to its caller: if anybody
/// but the channels could call it, anybody could take a signed deposit for himself.
abstract contract Collector is IDepositCollector {
    address public immutable channels;

    error OnlyChannels(address caller);

    constructor(address channels_) {
        channels = channels_;
    }

    modifier onlyChannels() {
        if (msg.sender != channels) revert OnlyChannels(msg.sender);
        _;
    }
}
