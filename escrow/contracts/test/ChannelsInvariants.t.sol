// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {IPaymentChannels as Channels} from "../src/IPaymentChannels.sol";
import {ChannelsBase} from "./ChannelsBase.sol";
import {PlainToken} from "./mocks/Tokens.sol";
import {vm} from "./Vm.sol";

/// @notice Plays channels at random and keeps a model of them. Before each call the model says whether
/// it will pass and who will have how much; after it the two are compared.
contract ChannelsHandler is ChannelsBase {
    struct Model {
        Channels.ChannelConfig config;
        bytes32 id;
        uint256 payerKey;
        uint256 receiverKey;
        uint128 balance;
        uint128 claimed;
        uint128 signed;
        uint128 pending;
        uint40 since;
        uint256 nonce;
    }

    uint256 public constant CHANNELS = 6;
    uint256 public constant PARTIES = 4;

    Model[] private _models;
    address[] public parties;
    mapping(address => uint256) public expected;
    mapping(address => uint256) public claimedFor;
    mapping(address => uint256) public settledFor;
    uint256 public minted;

    constructor() {
        super.setUp();
        token = IERC20(address(new PlainToken()));
        for (uint256 i = 0; i < PARTIES; ++i) {
            address party = vm.addr(0x2000 + i);
            parties.push(party);
            PlainToken(address(token)).mint(party, 1_000_000);
            (expected[party], minted) = (1_000_000, minted + 1_000_000);
            useCollector(party);
        }
        for (uint256 i = 0; i < CHANNELS; ++i) {
            Model storage model = _models.push();
            // Two payers, two receivers; every third channel has a relay's key for the receiver.
            (model.payerKey, model.receiverKey) = (0x2000 + i % 2, 0x2002 + (i / 2) % 2);
            model.config = Channels.ChannelConfig(
                vm.addr(model.payerKey),
                vm.addr(model.payerKey),
                vm.addr(model.receiverKey),
                vm.addr(i % 3 == 0 ? 0x3000 : model.receiverKey),
                address(token),
                DELAY,
                bytes32(i)
            );
            if (i % 3 == 0) model.receiverKey = 0x3000;
            model.id = channelOf(model.config);
        }
    }

    // ----------------------------------------------------------------------------------- moves

    function pass(uint256 seconds_) external {
        vm.warp(block.timestamp + seconds_ % (DELAY / 2));
    }

    function deposit(uint256 which, uint128 amount) external {
        Model storage m = _models[which % CHANNELS];
        amount = amount % 1000;
        bool fine = amount > 0 && expected[m.config.payer] >= amount;
        (bool done,) =
            send(address(this), abi.encodeCall(Channels.deposit, (m.config, amount, address(plain), "")));
        agree("deposit", done, fine);
        if (!done) return;
        m.balance += amount;
        expected[m.config.payer] -= amount;
    }

    function claim(uint256 which, uint128 most, uint128 total, uint256 by, bool forged) external {
        Model storage m = _models[which % CHANNELS];
        most = most % (m.balance + 20);
        total = total % (most + 3);
        Channels.VoucherClaim memory row = voucher(m.config, forged ? 0x4000 : m.payerKey, most, total);
        if (!forged && most > m.signed) m.signed = most;
        address caller = by % 3 == 0 ? m.config.receiver : by % 3 == 1 ? m.config.receiverAuthorizer : stranger;
        bool fine = by % 3 < 2 && mayClaim(m, most, total, forged);
        (bool done,) = send(caller, abi.encodeCall(Channels.claim, (one(row))));
        agree("claim", done, fine);
        if (done) booked(m, total);
    }

    function claimTwo(uint256 first, uint256 second, uint128 most, bool wrong) external {
        Model storage a = _models[first % CHANNELS];
        Model storage b = _models[second % CHANNELS];
        Channels.VoucherClaim[] memory rows = new Channels.VoucherClaim[](2);
        (uint128 mostA, uint128 mostB) = (most % (a.balance + 10), (most / 7) % (b.balance + 10));
        rows[0] = voucher(a.config, a.payerKey, mostA, mostA);
        rows[1] = voucher(b.config, b.payerKey, mostB, mostB);
        if (mostA > a.signed) a.signed = mostA;
        if (mostB > b.signed) b.signed = mostB; // It may be the same channel.
        bytes memory signature = sign(wrong ? 0x4000 : a.receiverKey, batchDigest(rows));
        bool fine = !wrong && a.config.receiverAuthorizer == b.config.receiverAuthorizer
            && mayClaim(a, mostA, mostA, false) && mayClaim(b, mostB, mostB, false);
        (bool done,) = send(stranger, abi.encodeCall(Channels.claimWithSignature, (rows, signature)));
        agree("claimWithSignature", done, fine);
        if (!done) return;
        booked(a, mostA);
        booked(b, mostB);
    }

    function settle(uint256 which) external {
        address receiver = parties[2 + which % 2];
        (bool done,) = send(stranger, abi.encodeCall(Channels.settle, (receiver, address(token))));
        agree("settle", done, true);
        expected[receiver] += claimedFor[receiver] - settledFor[receiver];
        settledFor[receiver] = claimedFor[receiver];
    }

    function initiateWithdraw(uint256 which, uint128 amount, bool payer) external {
        Model storage m = _models[which % CHANNELS];
        uint128 free = m.balance - m.claimed;
        amount = amount % (free + 3);
        bool fine = payer && amount > 0 && amount <= free && m.since == 0;
        address caller = payer ? m.config.payer : stranger;
        (bool done,) = send(caller, abi.encodeCall(Channels.initiateWithdraw, (m.config, amount)));
        agree("initiateWithdraw", done, fine);
        if (done) (m.pending, m.since) = (amount, uint40(block.timestamp));
    }

    function finalizeWithdraw(uint256 which, bool payer) external {
        Model storage m = _models[which % CHANNELS];
        bool fine = payer && m.since != 0 && block.timestamp >= m.since + DELAY;
        address caller = payer ? m.config.payer : stranger;
        (bool done,) = send(caller, abi.encodeCall(Channels.finalizeWithdraw, (m.config)));
        agree("finalizeWithdraw", done, fine);
        if (!done) return;
        uint128 free = m.balance - m.claimed;
        back(m, m.pending < free ? m.pending : free);
        (m.pending, m.since) = (0, 0);
    }

    function refund(uint256 which, uint128 amount, uint256 by, uint256 nonce) external {
        Model storage m = _models[which % CHANNELS];
        uint128 free = m.balance - m.claimed;
        amount = amount % (free + 3);
        bool done;
        bool fine = amount > 0;
        if (by % 3 == 0) {
            (done,) = send(m.config.receiver, abi.encodeCall(Channels.refund, (m.config, amount)));
        } else if (by % 3 == 1) {
            fine = false;
            (done,) = send(stranger, abi.encodeCall(Channels.refund, (m.config, amount)));
        } else {
            nonce = m.nonce + nonce % 2;
            fine = fine && nonce == m.nonce;
            bytes memory signature = sign(m.receiverKey, refundDigest(m.id, nonce, amount));
            (done,) = send(
                stranger, abi.encodeCall(Channels.refundWithSignature, (m.config, amount, nonce, signature))
            );
        }
        agree("refund", done, fine);
        if (!done) return;
        m.nonce += 1;
        amount = amount < free ? amount : free;
        if (amount == 0) return;
        if (amount >= m.pending) (m.pending, m.since) = (0, 0);
        else m.pending -= amount;
        back(m, amount);
    }

    // ---------------------------------------------------------------------------------- within

    function mayClaim(Model storage m, uint128 most, uint128 total, bool forged) private view returns (bool) {
        return total <= m.claimed || (total <= most && total <= m.balance && !forged);
    }

    function booked(Model storage m, uint128 total) private {
        if (total <= m.claimed) return;
        claimedFor[m.config.receiver] += total - m.claimed;
        m.claimed = total;
    }

    function back(Model storage m, uint128 amount) private {
        m.balance -= amount;
        expected[m.config.payer] += amount;
    }

    function send(address caller, bytes memory data) private returns (bool done, bytes memory answer) {
        vm.prank(caller);
        (done, answer) = address(channels).call(data);
    }

    function agree(string memory what, bool done, bool fine) private pure {
        vm.assertTrue(done == fine, string.concat(what, done ? " passed" : " was refused"));
    }

    // ---------------------------------------------------------------------------------- checks

    function check() external view {
        uint256 owed;
        for (uint256 i = 0; i < CHANNELS; ++i) {
            Model storage m = _models[i];
            checkChannel(m.id, m.balance, m.claimed);
            checkPending(m.id, m.pending, m.since);
            vm.assertEq(channels.refundNonce(m.id), m.nonce, "nonce");
            vm.assertLe(uint256(m.claimed), m.balance, "claimed of what is there");
            vm.assertLe(uint256(m.claimed), m.signed, "claimed of what was signed");
            owed += m.balance - m.claimed;
        }
        uint256 held;
        for (uint256 i = 0; i < PARTIES; ++i) {
            address party = parties[i];
            (uint128 claimed, uint128 settled) = channels.receivers(party, address(token));
            vm.assertEq(uint256(claimed), claimedFor[party], "claimed for");
            vm.assertEq(uint256(settled), settledFor[party], "settled for");
            vm.assertEq(token.balanceOf(party), expected[party], "wealth");
            owed += claimed - settled;
            held += token.balanceOf(party);
        }
        vm.assertEq(token.balanceOf(address(channels)), owed, "what is held is what is owed");
        vm.assertEq(held + owed, minted, "no unit lost");
        vm.assertEq(token.balanceOf(stranger), 0, "nothing for strangers");
    }

    /// @notice Everybody goes home: payers by withdrawal, with nobody's help, receivers by `settle`.
    function goHome() external {
        for (uint256 i = 0; i < CHANNELS; ++i) {
            Model storage m = _models[i];
            uint128 free = m.balance - m.claimed;
            vm.startPrank(m.config.payer);
            if (m.since != 0) {
                vm.warp(block.timestamp + DELAY);
                channels.finalizeWithdraw(m.config);
                back(m, m.pending < free ? m.pending : free);
                free = m.balance - m.claimed;
            }
            if (free > 0) {
                channels.initiateWithdraw(m.config, free);
                vm.warp(block.timestamp + DELAY);
                channels.finalizeWithdraw(m.config);
                back(m, free);
            }
            vm.stopPrank();
            (m.pending, m.since) = (0, 0);
        }
        for (uint256 i = 2; i < PARTIES; ++i) this.settle(i);
        this.check();
        vm.assertEq(token.balanceOf(address(channels)), 0, "nothing stays behind");
    }
}

/// forge-config: test.invariant.runs = 20
/// forge-config: test.invariant.depth = 150
contract ChannelsInvariantsTest {
    ChannelsHandler private _handler;

    function setUp() public {
        _handler = new ChannelsHandler();
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(_handler);
    }

    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    function targetSelectors() public view returns (FuzzSelector[] memory targets) {
        targets = new FuzzSelector[](1);
        bytes4[] memory moves = new bytes4[](8);
        moves[0] = ChannelsHandler.pass.selector;
        moves[1] = ChannelsHandler.deposit.selector;
        moves[2] = ChannelsHandler.claim.selector;
        moves[3] = ChannelsHandler.claimTwo.selector;
        moves[4] = ChannelsHandler.settle.selector;
        moves[5] = ChannelsHandler.initiateWithdraw.selector;
        moves[6] = ChannelsHandler.finalizeWithdraw.selector;
        moves[7] = ChannelsHandler.refund.selector;
        targets[0] = FuzzSelector(address(_handler), moves);
    }

    function invariant_theModelIsRight() public view {
        _handler.check();
    }

    function afterInvariant() public {
        _handler.goHome();
    }
}
