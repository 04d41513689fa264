// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow} from "../src/IJobEscrow.sol";
import {IPaymentChannels} from "../src/IPaymentChannels.sol";
import {IStakeVault} from "../src/IStakeVault.sol";
import {IEscrowFactory} from "./Base.sol";
import {ChannelsBase} from "./ChannelsBase.sol";
import {vm} from "./Vm.sol";

interface IPanels {
    function deploy(uint256 threshold, address[] calldata members) external returns (address);
    function panelOf(uint256 threshold, address[] calldata members) external view returns (address);
}

interface IPanel {
    function rule(
        address escrow,
        IJobEscrow.Terms calldata terms,
        uint256 toSeller,
        uint256 penalty,
        bytes32 evidence,
        bytes[] calldata sigs
    ) external;
}

/// @notice What every path costs. Each call is a transaction of its own (`isolate`): the price of
/// entry and of the calldata is counted, storage is cold, refunds are taken off.
///
/// Steady state unless named otherwise: balances, the seller's nonce word and the buyer's permit
/// nonce are not zero. Writes out/gas.json, which scripts/gas.js compares with gas-snapshot.json.
contract GasTest is ChannelsBase {
    string private constant DESCRIPTION = "https://example.org/jobs/0123456789abcdef0123456789abcdef/task.json";

    string private _json;

    function setUp() public override {
        super.setUp();
        // A job and a deal stay open, so that counter and balance are not zero, and a permit is used.
        escrow.createJob(seller, arbiter, START + 1 days, DESCRIPTION, address(0));
        IJobEscrow.Terms memory t = someTerms();
        t.nonce = 1;
        _openBy(t, byPermit(BUYER_KEY, PRICE, START + 1));
        allow(buyer);
    }

    function test_gas() public {
        _section(_plain);
        _section(_openings);
        _section(_firstPermit);
        _section(_settlements);
        _section(_batch);
        _section(_silence);
        _section(_disputes);
        _section(_stakes);
        _section(_panels);
        _section(_channels);
        _section(_channelBatch);
        _section(_others);
        vm.writeJson(_json, "out/gas.json");
    }

    // -------------------------------------------------------------------------------- sections

    function _plain() private {
        vm.prank(buyer);
        token.approve(address(escrow), 0);
        vm.prank(buyer);
        uint256 id = escrow.createJob(seller, arbiter, START + 1 days, DESCRIPTION, address(0));
        uint256 sum = _note("plain.createJob");
        vm.prank(seller);
        escrow.setBudget(id, PRICE, "");
        sum += _note("plain.setBudget");
        vm.prank(buyer);
        token.approve(address(escrow), PRICE);
        sum += _note("plain.approve");
        vm.prank(buyer);
        escrow.fund(id, PRICE, "");
        sum += _note("plain.fund");
        vm.prank(seller);
        escrow.submit(id, RESULT, "");
        sum += _note("plain.submit");
        vm.prank(arbiter);
        escrow.complete(id, RESULT, "");
        sum += _note("plain.complete");
        _record("plain.sum", sum);
    }

    function _openings() private {
        uint256 state = vm.snapshotState();
        IJobEscrow.Terms memory t = someTerms();
        IJobEscrow.Funding memory permit = byPermit(BUYER_KEY, PRICE, START + 1);
        vm.prank(buyer);
        token.approve(address(escrow), 0);
        _openBy(t, permit);
        _note("open.permit");

        vm.revertToState(state);
        _openBy(t, byAllowance());
        _note("open.allowance");

        vm.revertToState(state);
        _openBy(t, byAuthorization(BUYER_KEY, PRICE, bytes32(idOf(t))));
        _note("open.authorization");

        vm.revertToState(state);
        bytes memory buyerSig = signTerms(BUYER_KEY, t);
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        vm.prank(stranger);
        escrow.open(t, buyerSig, sellerSig, byAllowance());
        _note("open.allowance.relayed");
    }

    function _firstPermit() private {
        // A seller and a buyer who never met anybody: no nonce word, no permit nonce.
        useToken(create("CoaseToken", abi.encode(address(this))));
        token.transfer(buyer, 1_000_000);
        vm.prank(buyer);
        token.approve(address(escrow), 0);
        IJobEscrow.Terms memory t = someTerms();
        _openBy(t, byPermit(BUYER_KEY, PRICE, START + 1));
        _note("open.permit.first");
    }

    function _settlements() private {
        uint256 state = vm.snapshotState();
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = open(t);
        _settle(t, PRICE, sign(BUYER_KEY, settlementDigest(id, RESULT, PRICE)), "", seller);
        _note("settle.working");

        vm.revertToState(state);
        open(t);
        _settle(t, 600, sign(BUYER_KEY, settlementDigest(id, RESULT, 600)), "", seller);
        _note("settle.working.split");

        vm.revertToState(state);
        openSubmitted(t);
        _settle(t, PRICE, "", "", buyer);
        _note("settle.delivered");

        vm.revertToState(state);
        open(t);
        vm.prank(seller);
        escrow.decline(t);
        _note("decline");
    }

    function _batch() private {
        uint256 count = 20;
        IJobEscrow.Settle[] memory rows = new IJobEscrow.Settle[](count);
        for (uint256 i = 0; i < count; ++i) {
            IJobEscrow.Terms memory t = someTerms();
            t.nonce = 20 + i;
            uint256 id = open(t);
            rows[i] = IJobEscrow.Settle(t, RESULT, PRICE, sign(BUYER_KEY, settlementDigest(id, RESULT, PRICE)), "");
        }
        vm.prank(seller);
        escrow.settleMany(rows);
        _record("settleMany.20.each", uint256(vm.lastCallGas().gasTotalUsed) / count);
    }

    function _silence() private {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = open(t);
        submit(id);
        _note("submit");
        uint256 state = vm.snapshotState();
        vm.warp(START + t.disputeSecs + 1);
        vm.prank(seller);
        escrow.poke(t);
        _note("poke.silentBuyer");

        vm.revertToState(state);
        vm.warp(expiry(t));
        escrow.claimRefund(id);
        _note("claimRefund.deal");
        escrow.poke(t);
        _note("poke.expired");
    }

    function _disputes() private {
        IJobEscrow.Terms memory t = someTerms();
        openSubmitted(t);
        dispute(t);
        _note("dispute.allowance");
        answer(t);
        _note("answer.allowance");
        token.transfer(arbiter, 1);
        vm.prank(arbiter);
        escrow.rule(t, 600, 0, EVIDENCE, "");
        _note("rule.split");
    }

    /// @dev Steady state: a slice of the seller's is reserved already, the buyer holds tokens.
    function _stakes() private {
        address factory = create("EscrowFactory", "");
        escrow = IJobEscrow(IEscrowFactory(factory).deploy(address(token)));
        allow(buyer);
        allow(seller);
        IStakeVault vault = IStakeVault(create("StakeVault", abi.encode(factory, address(token))));
        vm.startPrank(seller);
        token.approve(address(vault), type(uint256).max);
        vault.deposit(10);
        vault.deposit(100_000);
        _note("stake.deposit");
        vault.allow(address(token), 50_000);
        _note("stake.allow");
        vault.unbond(10);
        vault.unbond(10);
        _note("stake.unbond");
        vm.stopPrank();

        IJobEscrow.Terms memory t = someTerms();
        t.nonce = 1;
        _openBy(t, byAllowance());
        (t.vault, t.stake) = (address(vault), 300);
        t.nonce = 2;
        _openBy(t, byAllowance());
        t.nonce = 3;
        uint256 id = idOf(t);
        uint256 state = vm.snapshotState();
        _openBy(t, byAllowance());
        _note("stake.open.allowance");
        _settle(t, PRICE, sign(BUYER_KEY, settlementDigest(id, RESULT, PRICE)), "", seller);
        vault.close(address(escrow), t, 0, "");
        _note("stake.close.free");

        vm.revertToState(state);
        _openBy(t, byAllowance());
        vm.warp(t.deliverBy + 1);
        escrow.poke(t);
        bytes32 ack = digestOf(keccak256(abi.encode(keccak256("Ack(uint256 jobId,bytes32 input)"), id, RESULT)));
        vault.close(address(escrow), t, RESULT, sign(SELLER_KEY, ack));
        _note("stake.close.slash");

        vm.warp(block.timestamp + 7 days);
        vm.prank(seller);
        vault.release();
        _note("stake.release");
    }

    /// @dev Two of three sign; they hold tokens already.
    function _panels() private {
        address factory = create("EscrowFactory", "");
        escrow = IJobEscrow(IEscrowFactory(factory).deploy(address(token)));
        allow(buyer);
        allow(seller);
        IPanels panels = IPanels(create("PanelFactory", abi.encode(factory)));
        uint256[3] memory keys = [uint256(0xA1), 0xA2, 0xA3];
        for (uint256 i = 0; i < 4; ++i) {
            uint256 j = i % 2;
            if (vm.addr(keys[j]) > vm.addr(keys[j + 1])) (keys[j], keys[j + 1]) = (keys[j + 1], keys[j]);
        }
        address[] memory members = new address[](3);
        for (uint256 i = 0; i < 3; ++i) {
            members[i] = vm.addr(keys[i]);
            token.transfer(members[i], 1);
        }
        IJobEscrow.Terms memory t = someTerms();
        t.nonce = 1;
        _openBy(t, byAllowance());
        t.nonce = 2;
        t.arbiter = panels.panelOf(2, members);
        uint256 id = openAnswered(t);
        panels.deploy(2, members);
        _note("panel.deploy");
        bytes[] memory sigs = new bytes[](3);
        bytes32 digest = rulingDigest(id, 600, 0, EVIDENCE);
        (sigs[0], sigs[2]) = (sign(keys[0], digest), sign(keys[2], digest));
        IPanel(t.arbiter).rule(address(escrow), t, 600, 0, EVIDENCE, sigs);
        _note("panel.rule.2of3");
    }

    function _channels() private {
        IPaymentChannels.ChannelConfig memory c = someConfig();
        bytes32 id = channelOf(c);
        channels.deposit(c, 1000, collector3009, authorized(BUYER_KEY, collector3009, id, 1000, 1));
        _note("channel.deposit.first");
        channels.deposit(c, 1000, collector3009, authorized(BUYER_KEY, collector3009, id, 1000, 2));
        _note("channel.deposit");
        claimAs(seller, voucher(c, BUYER_KEY, 100, 100));
        _note("channel.claim.first");
        channels.settle(seller, address(token));
        claimAs(seller, voucher(c, BUYER_KEY, 200, 200));
        _note("channel.claim");
        channels.settle(seller, address(token));
        _note("channel.settle");
        bytes[] memory calls = new bytes[](2);
        calls[0] = abi.encodeCall(IPaymentChannels.claim, (one(voucher(c, BUYER_KEY, 300, 300))));
        calls[1] = abi.encodeCall(IPaymentChannels.settle, (seller, address(token)));
        vm.prank(seller);
        channels.multicall(calls);
        _note("channel.claimAndSettle");
        vm.prank(seller);
        channels.refund(c, 10);
        _note("channel.refund");
        vm.prank(buyer);
        channels.initiateWithdraw(c, 10);
        _note("channel.initiateWithdraw");
        vm.warp(block.timestamp + DELAY);
        vm.prank(buyer);
        channels.finalizeWithdraw(c);
        _note("channel.finalizeWithdraw");
    }

    /// @dev Second claims of a hundred channels of one receiver.
    function _channelBatch() private {
        IPaymentChannels.VoucherClaim[] memory rows = new IPaymentChannels.VoucherClaim[](100);
        for (uint128 round = 1; round <= 2; ++round) {
            for (uint256 i = 0; i < rows.length; ++i) {
                IPaymentChannels.ChannelConfig memory c = someConfig();
                c.salt = bytes32(i);
                if (round == 1) depositPlain(c, 100);
                rows[i] = voucher(c, BUYER_KEY, round, round);
            }
            vm.prank(seller);
            channels.claim(rows);
        }
        _record("channel.claim.100.each", vm.lastCallGas().gasTotalUsed / 100);
    }

    function _others() private {
        IJobEscrow.Terms memory t = someTerms();
        vm.prank(seller);
        escrow.cancel(t);
        _note("cancel");
        vm.prank(seller);
        escrow.invalidate(0, type(uint256).max);
        _note("invalidate");
        address factory = create("EscrowFactory", "");
        IEscrowFactory(factory).deploy(address(token));
        _note("factory.deploy");
    }

    // --------------------------------------------------------------------------------- helpers

    function _section(function() internal section) private {
        uint256 state = vm.snapshotState();
        section();
        string memory json = _json;
        vm.revertToState(state);
        _json = json;
    }

    function _openBy(IJobEscrow.Terms memory t, IJobEscrow.Funding memory funding) private {
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        vm.prank(buyer);
        escrow.open(t, "", sellerSig, funding);
    }

    function _settle(
        IJobEscrow.Terms memory t,
        uint256 toSeller,
        bytes memory buyerSig,
        bytes memory sellerSig,
        address caller
    ) private {
        vm.prank(caller);
        escrow.settle(t, RESULT, toSeller, buyerSig, sellerSig);
    }

    function _note(string memory name) private returns (uint256 gas) {
        gas = vm.lastCallGas().gasTotalUsed;
        _record(name, gas);
    }

    function _record(string memory name, uint256 gas) private {
        _json = vm.serializeUint("gas", name, gas);
    }
}
