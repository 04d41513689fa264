// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {IJobEscrow} from "../src/IJobEscrow.sol";
import {IStakeVault} from "../src/IStakeVault.sol";
import {Base, IEscrowFactory} from "./Base.sol";
import {vm} from "./Vm.sol";

/// @notice The world of Base with a factory that deployed the escrow, and a vault in the same token, in
/// which the seller has a thousand, all of which the escrow may reserve.
abstract contract StakeBase is Base {
    uint256 internal constant BONDED = 1000;
    uint256 internal constant STAKE = 300;
    uint256 internal constant ACK_SECS = 3 days;
    uint256 internal constant UNBOND_SECS = 7 days;
    bytes32 internal constant INPUT = keccak256("the input");

    IEscrowFactory internal factory;
    IStakeVault internal vault;

    function setUp() public virtual override {
        super.setUp();
        factory = IEscrowFactory(create("EscrowFactory", ""));
        useFactory();
        useVault(address(token));
        bondAll(seller, BONDED);
    }

    function useFactory() internal {
        escrow = IJobEscrow(factory.deploy(address(token)));
        vm.label(address(escrow), "escrow");
        allow(buyer);
        allow(seller);
    }

    function useVault(address stakeToken) internal {
        vault = IStakeVault(create("StakeVault", abi.encode(address(factory), stakeToken)));
        vm.label(address(vault), "vault");
    }

    /// @dev Deposits, and lets the escrow reserve all of it.
    function bondAll(address who, uint256 amount) internal {
        IERC20 stakeToken = IERC20(vault.token());
        vm.startPrank(who);
        stakeToken.approve(address(vault), type(uint256).max);
        vault.deposit(amount);
        vault.allow(address(token), amount);
        vm.stopPrank();
    }

    function stakedTerms() internal view returns (IJobEscrow.Terms memory t) {
        t = someTerms();
        (t.vault, t.stake) = (address(vault), STAKE);
    }

    // ----------------------------------------------------------------------------- signatures

    function ackDigest(uint256 id, bytes32 input) internal view returns (bytes32) {
        return digestOf(keccak256(abi.encode(keccak256("Ack(uint256 jobId,bytes32 input)"), id, input)));
    }

    function ackOf(uint256 key, uint256 id) internal view returns (bytes memory) {
        return sign(key, ackDigest(id, INPUT));
    }

    // ----------------------------------------------------------------------------- steps, reads

    function closeSlice(IJobEscrow.Terms memory t, bytes memory ackSig) internal {
        vault.close(address(escrow), t, INPUT, ackSig);
    }

    function ruleIt(IJobEscrow.Terms memory t, uint256 toSeller, uint256 penalty) internal {
        vm.prank(t.arbiter);
        escrow.rule(t, toSeller, penalty, EVIDENCE, "");
    }

    function pokeAt(IJobEscrow.Terms memory t, uint256 time) internal {
        vm.warp(time);
        escrow.poke(t);
    }

    function freeOf(address who) internal view returns (uint256 free) {
        (free,,,) = vault.stakeOf(who);
    }

    function reservedOf(address who) internal view returns (uint256 reserved) {
        (, reserved,,) = vault.stakeOf(who);
    }

    function checkStake(address who, uint256 free, uint256 reserved, uint256 unbonding) internal view {
        (uint256 f, uint256 r, uint256 u,) = vault.stakeOf(who);
        vm.assertEq(f, free, "free");
        vm.assertEq(r, reserved, "reserved");
        vm.assertEq(u, unbonding, "unbonding");
    }
}
