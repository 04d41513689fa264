// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC8183, IJobEscrow} from "../src/IJobEscrow.sol";
import {Base, ITypeHashes} from "./Base.sol";
import {Vm, vm} from "./Vm.sol";

/// @notice What opens, who gets what at each end, which logs it leaves.
contract DealTest is Base {
    // ------------------------------------------------------------------------ what does not open

    function test_openChecksTerms() public {
        IJobEscrow.Terms memory t = someTerms();
        t.asset = stranger;
        _refused(t, IJobEscrow.WrongAsset.selector);

        t = someTerms();
        t.price = 0;
        _refused(t, IJobEscrow.BadPrice.selector);
        t.price = uint256(1) << 128;
        _refused(t, IJobEscrow.BadPrice.selector);

        t = someTerms();
        t.defaultToSeller = t.price + 1;
        _refused(t, IJobEscrow.SplitAbovePrice.selector);

        t = someTerms();
        t.bond = t.price + 1;
        _refused(t, IJobEscrow.BadBond.selector);
        t = someTerms();
        t.arbiter = address(0);
        _refused(t, IJobEscrow.BadBond.selector);

        t = someTerms();
        t.vault = stranger;
        _refused(t, IJobEscrow.BadStake.selector);
        t = someTerms();
        t.stake = 1;
        _refused(t, IJobEscrow.BadStake.selector);
    }

    function test_openChecksParties() public {
        address[3] memory wrong = [address(0), address(escrow), address(0)];
        for (uint256 i = 0; i < 2; ++i) {
            IJobEscrow.Terms memory t = someTerms();
            t.buyer = wrong[i];
            _refused(t, IJobEscrow.BadParties.selector);
            t = someTerms();
            t.seller = wrong[i];
            _refused(t, IJobEscrow.BadParties.selector);
        }
        IJobEscrow.Terms memory s = someTerms();
        s.seller = s.buyer;
        _refused(s, IJobEscrow.BadParties.selector);
        s = someTerms();
        s.arbiter = s.buyer;
        _refused(s, IJobEscrow.BadParties.selector);
        s.arbiter = s.seller;
        _refused(s, IJobEscrow.BadParties.selector);
        s.arbiter = address(escrow);
        _refused(s, IJobEscrow.BadParties.selector);
    }

    function test_openChecksTimes() public {
        IJobEscrow.Terms memory t = someTerms();
        t.lockBy = block.timestamp - 1;
        _refused(t, IERC8183.TooLate.selector);
        t = someTerms();
        t.lockBy = t.deliverBy;
        _refused(t, IJobEscrow.BadTimes.selector);
        t = someTerms();
        t.deliverBy = block.timestamp + 30 days + 1;
        _refused(t, IJobEscrow.BadTimes.selector);
        t.deliverBy = type(uint256).max;
        _refused(t, IJobEscrow.BadTimes.selector);

        t = someTerms();
        t.disputeSecs = 0;
        _refused(t, IJobEscrow.BadWindows.selector);
        t.disputeSecs = 30 days + 1;
        _refused(t, IJobEscrow.BadWindows.selector);
        t = someTerms();
        t.answerSecs = 0;
        _refused(t, IJobEscrow.BadWindows.selector);
        t.answerSecs = type(uint256).max;
        _refused(t, IJobEscrow.BadWindows.selector);
        t = someTerms();
        t.ruleSecs = 0;
        _refused(t, IJobEscrow.BadWindows.selector);
        t.ruleSecs = 30 days + 1;
        _refused(t, IJobEscrow.BadWindows.selector);
    }

    function test_openAtTheEdges() public {
        IJobEscrow.Terms memory t = someTerms();
        (t.lockBy, t.deliverBy) = (block.timestamp, block.timestamp + 30 days);
        (t.disputeSecs, t.answerSecs, t.ruleSecs) = (30 days, 30 days, 30 days);
        (t.price, t.bond, t.defaultToSeller) = (1, 1, 1);
        uint256 id = open(t);
        checkState(id, IERC8183.Status.Funded, WORKING);
        (,, uint256 expiredAt, uint256 clock, uint256 budget,, address provider) = escrow.deal(id);
        vm.assertEq(expiredAt, expiry(t), "expiry");
        vm.assertEq(clock, t.deliverBy, "clock");
        vm.assertEq(budget, 1, "budget");
        vm.assertEq(provider, seller, "provider");
    }

    // ------------------------------------------------------------------------------------- ids

    function test_typeHashes() public view {
        ITypeHashes h = ITypeHashes(address(escrow));
        string memory work =
            "Work(string capability,bytes32 schemas,bytes32 task,string pricing,uint256 inputPrice,uint256 cachedInputPrice,uint256 outputPrice,uint256 secondPrice,uint256 inputMax,uint256 outputMax,uint256 quality,string model,string verification,string tokenizer,string settlement)";
        string memory terms =
            "Terms(address buyer,address seller,address asset,uint256 price,address arbiter,uint256 bond,uint256 defaultToSeller,uint256 lockBy,uint256 deliverBy,uint256 disputeSecs,uint256 answerSecs,uint256 ruleSecs,address vault,uint256 stake,Work work,uint256 nonce)";
        vm.assertEq(h.WORK_TYPEHASH(), keccak256(bytes(work)), "Work");
        vm.assertEq(h.TERMS_TYPEHASH(), keccak256(bytes(string.concat(terms, work))), "Terms");
        vm.assertEq(
            h.SETTLEMENT_TYPEHASH(),
            keccak256("Settlement(uint256 jobId,bytes32 deliverable,uint256 toSeller)"),
            "Settlement"
        );
        vm.assertEq(h.DELIVERY_TYPEHASH(), keccak256("Delivery(uint256 jobId,bytes32 deliverable)"), "Delivery");
        vm.assertEq(h.DISPUTE_TYPEHASH(), keccak256("Dispute(uint256 jobId,bytes32 evidence)"), "Dispute");
        vm.assertEq(h.ANSWER_TYPEHASH(), keccak256("Answer(uint256 jobId,bytes32 evidence)"), "Answer");
        vm.assertEq(
            h.RULING_TYPEHASH(),
            keccak256("Ruling(uint256 jobId,uint256 toSeller,uint256 penalty,bytes32 evidence)"),
            "Ruling"
        );
    }

    /// @notice Every field is in the id, and so are chain and contract.
    function testFuzz_everyFieldIsInTheId(uint256 field, uint256 flip) public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = escrow.jobId(t);
        vm.assertEq(id, idOf(t), "id");
        uint256 slot = field % 16;
        bool narrow = slot < 3 || slot == 4 || slot == 12;
        uint256 mask = 1 << (flip % (narrow ? 160 : 256));
        assembly ("memory-safe") {
            let at := add(t, mul(slot, 0x20))
            mstore(at, xor(mload(at), mask))
        }
        vm.assertTrue(escrow.jobId(t) != id, "one bit, another id");
        vm.assertEq(escrow.jobId(t), idOf(t), "as computed here");
    }

    function testFuzz_idOfRandomTerms(IJobEscrow.Terms memory t, uint32 chain) public {
        vm.chainId(uint256(chain) + 1);
        vm.assertEq(escrow.jobId(t), idOf(t), "id");
    }

    /// @notice Wallets hash the nested Work; the contract is handed its hash. They must agree.
    function test_idAsWalletsComputeIt() public {
        IJobEscrow.Terms memory t = someTerms();
        t.work = keccak256(
            bytes.concat(
                abi.encode(
                    ITypeHashes(address(escrow)).WORK_TYPEHASH(),
                    keccak256("summarise"),
                    bytes32(uint256(1)),
                    bytes32(uint256(2)),
                    keccak256("metered"),
                    3,
                    4,
                    5
                ),
                abi.encode(
                    6, 7, 8, 9, keccak256("a-model"), keccak256("schema"), keccak256("bytes"), keccak256("escrow")
                )
            )
        );
        vm.assertEq(bytes32(escrow.jobId(t)), vm.eip712HashTypedData(_typedData(t)), "digest");
    }

    function test_sameTermsOpenOnce() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = open(t);
        bytes memory sig = signTerms(SELLER_KEY, t);
        vm.prank(buyer);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.JobExists.selector, id));
        escrow.open(t, "", sig, byAllowance());
    }

    function test_oneNonceOneDeal() public {
        IJobEscrow.Terms memory first = someTerms();
        IJobEscrow.Terms memory second = someTerms();
        second.price += 1;
        open(first);
        bytes memory sig = signTerms(SELLER_KEY, second);
        vm.prank(buyer);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.NonceUsed.selector, seller, second.nonce));
        escrow.open(second, "", sig, byAllowance());
        vm.assertEq(escrow.nonceBitmap(seller, 0), 1 << 7, "one bit");
    }

    function test_cancelLeavesTheNonce() public {
        IJobEscrow.Terms memory t = someTerms();
        vm.expectRevert(abi.encodeWithSelector(IERC8183.NotAllowed.selector, idOf(t), address(this)));
        escrow.cancel(t);
        vm.prank(seller);
        escrow.cancel(t);
        checkState(idOf(t), IERC8183.Status.Rejected, CANCELLED);
        (IJobEscrow.How how,) = escrow.outcome(idOf(t));
        vm.assertEq(uint256(how), uint256(IJobEscrow.How.Open), "not an outcome");
        bytes memory sig = signTerms(SELLER_KEY, t);
        vm.prank(buyer);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.JobExists.selector, idOf(t)));
        escrow.open(t, "", sig, byAllowance());
        t.work = keccak256("other work");
        open(t);
    }

    function test_aFailedOpenLeavesNothing() public {
        IJobEscrow.Terms memory t = someTerms();
        t.price = 2_000_000;
        bytes memory sig = signTerms(SELLER_KEY, t);
        vm.prank(buyer);
        vm.expectRevert();
        escrow.open(t, "", sig, byAllowance());
        vm.assertEq(escrow.nonceBitmap(seller, 0), 0, "no bit");
        checkState(idOf(t), IERC8183.Status.Open, 0);
        vm.expectRevert(abi.encodeWithSelector(IERC8183.JobNotFound.selector, idOf(t)));
        escrow.getJob(idOf(t));
    }

    // ------------------------------------------------------------------------------------ ends

    function test_endOfEachSilence() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 state = vm.snapshotState();
        uint256 id = open(t);
        vm.warp(t.deliverBy + 1);
        _closes(t, id, IJobEscrow.How.Undelivered, IERC8183.Status.Rejected, 0, 0, 0);

        vm.revertToState(state);
        openSubmitted(t);
        vm.warp(START + t.disputeSecs + 1);
        _closes(t, id, IJobEscrow.How.SilentBuyer, IERC8183.Status.Completed, 1000, -1000, 0);

        vm.revertToState(state);
        openDisputed(t);
        vm.warp(START + t.answerSecs + 1);
        _closes(t, id, IJobEscrow.How.SilentSeller, IERC8183.Status.Rejected, 0, 0, 0);

        vm.revertToState(state);
        openAnswered(t);
        vm.warp(START + t.ruleSecs + 1);
        _closes(t, id, IJobEscrow.How.SilentArbiter, IERC8183.Status.Completed, 400, -400, 0);
    }

    /// @notice In a ruling each side pays of the arbiter's fee what it lost of the price.
    function test_ruling() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 state = vm.snapshotState();
        // price, bond, toSeller; then the changes from before the deal: seller, buyer, arbiter
        int256[6][5] memory rows = [
            [int256(1000), 90, 1000, 1000, -1090, 90],
            [int256(1000), 90, 0, -90, 0, 90],
            [int256(1000), 90, 600, 564, -654, 90],
            [int256(3), 1, 1, 1, -2, 1],
            [int256(1), 1, 1, 1, -2, 1]
        ];
        for (uint256 i = 0; i < rows.length; ++i) {
            int256[6] memory row = rows[i];
            (t.price, t.bond, t.defaultToSeller) = (uint256(row[0]), uint256(row[1]), 0);
            int256 s = int256(token.balanceOf(seller));
            int256 b = int256(token.balanceOf(buyer));
            uint256 id = openAnswered(t);
            vm.prank(arbiter);
            escrow.rule(t, uint256(row[2]), 0, EVIDENCE, "");
            vm.assertEq(int256(token.balanceOf(seller)) - s, row[3], "seller");
            vm.assertEq(int256(token.balanceOf(buyer)) - b, row[4], "buyer");
            vm.assertEq(int256(token.balanceOf(arbiter)), row[5], "arbiter");
            vm.assertEq(token.balanceOf(address(escrow)), 0, "nothing stays");
            checkClosed(
                id,
                row[2] == 0 ? IERC8183.Status.Rejected : IERC8183.Status.Completed,
                IJobEscrow.How.Ruled
            );
            vm.revertToState(state);
        }
    }

    function testFuzz_rulingSharesEveryUnit(uint128 price, uint128 bond, uint128 toSeller) public {
        IJobEscrow.Terms memory t = someTerms();
        t.price = 1 + price % 500_000;
        t.bond = bond % (t.price + 1);
        t.defaultToSeller = 0;
        uint256 a = toSeller % (t.price + 1);
        uint256 b0 = token.balanceOf(buyer);
        uint256 s0 = token.balanceOf(seller);
        openDisputed(t);
        if (t.bond > 0) answer(t);
        vm.prank(arbiter);
        escrow.rule(t, a, 0, EVIDENCE, "");
        uint256 back = t.bond * (t.price - a) / t.price;
        vm.assertEq(token.balanceOf(arbiter), t.bond, "the fee is one bond, whatever it rules");
        vm.assertEq(token.balanceOf(buyer), b0 - a - t.bond + back, "buyer");
        vm.assertEq(token.balanceOf(seller), s0 + a - back, "seller");
        vm.assertEq(token.balanceOf(address(escrow)), 0, "nothing stays");
    }

    function test_settlementReturnsBonds() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = openAnswered(t);
        bytes memory sig = sign(SELLER_KEY, settlementDigest(id, RESULT, 700));
        vm.prank(buyer);
        escrow.settle(t, RESULT, 700, "", sig);
        vm.assertEq(token.balanceOf(buyer), 1_000_000 - 700, "buyer");
        vm.assertEq(token.balanceOf(seller), 1_000_000 + 700, "seller");
        checkClosed(id, IERC8183.Status.Completed, IJobEscrow.How.Settled);
    }

    function test_expiryMovesNothingOut() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = openSubmitted(t);
        vm.warp(expiry(t) + 1000 days);
        escrow.claimRefund(id);
        vm.assertEq(token.balanceOf(address(escrow)), PRICE, "still here");
        checkState(id, IERC8183.Status.Expired, DELIVERED);
        vm.prank(stranger);
        escrow.poke(t);
        vm.assertEq(token.balanceOf(seller), 1_000_000 + PRICE, "the seller delivered and is paid");
        checkClosed(id, IERC8183.Status.Expired, IJobEscrow.How.SilentBuyer);
    }

    function test_oneBadRowRevertsAll() public {
        IJobEscrow.Terms memory first = someTerms();
        IJobEscrow.Terms memory second = someTerms();
        second.nonce = 8;
        IJobEscrow.Settle[] memory rows = new IJobEscrow.Settle[](2);
        rows[0] = IJobEscrow.Settle(first, RESULT, PRICE, sign(BUYER_KEY, settlementDigest(open(first), RESULT, PRICE)), "");
        rows[1] = IJobEscrow.Settle(second, RESULT, PRICE, "", "");
        uint256 id = open(second);
        vm.prank(seller);
        vm.expectRevert(abi.encodeWithSelector(IJobEscrow.BadSignature.selector, buyer));
        escrow.settleMany(rows);
        rows[1].buyerSig = sign(BUYER_KEY, settlementDigest(id, RESULT, PRICE));
        vm.prank(seller);
        escrow.settleMany(rows);
        vm.assertEq(token.balanceOf(seller), 1_000_000 + 2 * PRICE, "both");
        vm.prank(seller);
        vm.expectPartialRevert(IJobEscrow.WrongPhase.selector);
        escrow.settleMany(rows);
    }

    // ------------------------------------------------------------------------------- boundaries

    /// @notice At each instant at most one side of a deadline can act: L-1 and L the act, L+1 silence.
    function test_limits() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 state = vm.snapshotState();
        open(t);
        _limit(t, t.deliverBy, seller, abi.encodeCall(IERC8183.submit, (idOf(t), RESULT, "")));
        _limit(t, t.deliverBy, seller, abi.encodeCall(IJobEscrow.deliver, (t, RESULT, "")));
        _limit(t, t.deliverBy, seller, abi.encodeCall(IJobEscrow.decline, (t)));
        vm.revertToState(state);
        openSubmitted(t);
        bytes memory act = abi.encodeCall(IJobEscrow.dispute, (t, EVIDENCE, "", byAllowance()));
        _limit(t, START + t.disputeSecs, buyer, act);
        vm.revertToState(state);
        openDisputed(t);
        act = abi.encodeCall(IJobEscrow.answer, (t, EVIDENCE, "", byAllowance()));
        _limit(t, START + t.answerSecs, seller, act);
        vm.revertToState(state);
        openAnswered(t);
        act = abi.encodeCall(IJobEscrow.rule, (t, 1, 0, EVIDENCE, ""));
        _limit(t, START + t.ruleSecs, arbiter, act);
    }

    function test_refundLimit() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = open(t);
        vm.warp(expiry(t) - 1);
        vm.expectRevert(abi.encodeWithSelector(IERC8183.TooEarly.selector, id, expiry(t)));
        escrow.claimRefund(id);
        vm.warp(expiry(t));
        escrow.claimRefund(id);
    }

    /// @notice However late each step, every limit lies before expiry.
    function testFuzz_everyLimitIsBeforeExpiry(uint256 a, uint256 b, uint256 c) public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = open(t);
        vm.warp(START + a % (t.deliverBy - START + 1));
        submit(id);
        vm.warp(block.timestamp + b % (t.disputeSecs + 1));
        dispute(t);
        vm.warp(block.timestamp + c % (t.answerSecs + 1));
        answer(t);
        vm.assertLe(clockOf(id) + t.ruleSecs + 1, expiry(t), "limit");
        vm.warp(expiry(t));
        escrow.poke(t);
    }

    // ------------------------------------------------------------------------------------ views

    function test_getJobOfADeal() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = open(t);
        vm.warp(START + 5);
        submit(id);
        IERC8183.JobView memory job = escrow.getJob(id);
        vm.assertEq(job.id, id, "id");
        vm.assertEq(job.client, address(escrow), "client");
        vm.assertEq(job.evaluator, address(escrow), "evaluator");
        vm.assertEq(job.provider, seller, "provider");
        vm.assertEq(job.hook, address(0), "hook");
        vm.assertEq(job.budget, PRICE, "budget");
        vm.assertEq(job.expiredAt, expiry(t), "expiry");
        vm.assertEq(job.submittedAt, START + 5, "submitted");
        vm.assertEq(job.deliverable, RESULT, "deliverable");
        vm.assertEq(job.description, string.concat("coase:terms:", vm.toString(bytes32(id))), "description");
        dispute(t);
        vm.assertEq(escrow.getJob(id).submittedAt, 0, "no longer known");
    }

    // ------------------------------------------------------------------------------------- logs

    function test_logsOfOpen() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = idOf(t);
        bytes memory sig = signTerms(SELLER_KEY, t);
        vm.recordLogs();
        vm.prank(buyer);
        escrow.open(t, "", sig, byAllowance());
        Vm.Log[] memory logs = vm.getRecordedLogs();
        vm.assertEq(logs.length, 5, "job created, budget set, job funded, deal opened, transfer");
        vm.assertEq(logs[0].topics[0], IERC8183.JobCreated.selector, "JobCreated");
        vm.assertEq(logs[1].topics[0], IERC8183.BudgetSet.selector, "BudgetSet");
        vm.assertEq(logs[2].topics[0], IERC8183.JobFunded.selector, "JobFunded");
        vm.assertEq(logs[3].topics[0], IJobEscrow.DealOpened.selector, "DealOpened");
        vm.assertEq(logs[3].topics[1], bytes32(id), "id");
        vm.assertEq(keccak256(logs[3].data), keccak256(abi.encode(t)), "the whole Terms");
    }

    function test_logsOfSettlementFromWorking() public {
        IJobEscrow.Terms memory t = someTerms();
        uint256 id = open(t);
        bytes memory sig = sign(BUYER_KEY, settlementDigest(id, RESULT, 600));
        vm.recordLogs();
        vm.prank(seller);
        escrow.settle(t, RESULT, 600, sig, "");
        Vm.Log[] memory logs = vm.getRecordedLogs();
        vm.assertEq(logs[0].topics[0], IERC8183.JobSubmitted.selector, "JobSubmitted");
        vm.assertEq(logs[0].data.length == 32 ? bytes32(logs[0].data) : bytes32(0), RESULT, "deliverable");
        vm.assertEq(logs[1].topics[0], IERC8183.JobCompleted.selector, "JobCompleted");
        vm.assertEq(logs[2].topics[0], IERC8183.PaymentReleased.selector, "PaymentReleased");
        vm.assertEq(logs[3].topics[0], IJobEscrow.DealSettled.selector, "DealSettled");
        vm.assertEq(
            keccak256(logs[3].data), keccak256(abi.encode(uint256(600), uint256(400), uint8(1))), "who got what"
        );
        vm.assertEq(escrow.getJob(id).submittedAt, START, "submitted just then");
    }

    function test_logsOfRejection() public {
        IJobEscrow.Terms memory t = someTerms();
        open(t);
        vm.recordLogs();
        vm.prank(seller);
        escrow.decline(t);
        Vm.Log[] memory logs = vm.getRecordedLogs();
        vm.assertEq(logs[0].topics[0], IERC8183.JobRejected.selector, "JobRejected");
        vm.assertEq(logs[1].topics[0], IERC8183.Refunded.selector, "Refunded");
        vm.assertEq(logs[2].topics[0], IJobEscrow.DealSettled.selector, "DealSettled");
    }

    // --------------------------------------------------------------------------------- helpers

    function _refused(IJobEscrow.Terms memory t, bytes4 selector) private {
        bytes memory buyerSig = signTerms(BUYER_KEY, t);
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        vm.expectPartialRevert(selector);
        escrow.open(t, buyerSig, sellerSig, byAllowance());
    }

    function _closes(
        IJobEscrow.Terms memory t,
        uint256 id,
        IJobEscrow.How how,
        IERC8183.Status status,
        int256 sellerChange,
        int256 buyerChange,
        int256 arbiterChange
    ) private {
        vm.prank(stranger);
        escrow.poke(t);
        checkClosed(id, status, how);
        vm.assertEq(int256(token.balanceOf(seller)), 1_000_000 + sellerChange, "seller");
        vm.assertEq(int256(token.balanceOf(buyer)), 1_000_000 + buyerChange, "buyer");
        vm.assertEq(int256(token.balanceOf(arbiter)), arbiterChange, "arbiter");
        vm.assertEq(token.balanceOf(address(escrow)), 0, "nothing stays");
    }

    function _limit(IJobEscrow.Terms memory t, uint256 limit, address actor, bytes memory act) private {
        uint256 state = vm.snapshotState();
        for (uint256 time = limit - 1; time <= limit + 1; ++time) {
            bool late = time > limit;
            vm.warp(time);
            vm.prank(actor);
            (bool acted,) = address(escrow).call(act);
            vm.assertTrue(acted != late, "act");
            vm.revertToState(state);
            vm.warp(time);
            (bool poked,) = address(escrow).call(abi.encodeCall(IJobEscrow.poke, (t)));
            vm.assertTrue(poked == late, "silence");
            vm.revertToState(state);
        }
    }

    function _typedData(IJobEscrow.Terms memory t) private view returns (string memory) {
        string memory types = string.concat(
            '{"types":{"EIP712Domain":[{"name":"name","type":"string"},{"name":"version","type":"string"},',
            '{"name":"chainId","type":"uint256"},{"name":"verifyingContract","type":"address"}],"Terms":[',
            '{"name":"buyer","type":"address"},{"name":"seller","type":"address"},{"name":"asset","type":"address"},',
            '{"name":"price","type":"uint256"},{"name":"arbiter","type":"address"},{"name":"bond","type":"uint256"},',
            '{"name":"defaultToSeller","type":"uint256"},{"name":"lockBy","type":"uint256"},',
            '{"name":"deliverBy","type":"uint256"},{"name":"disputeSecs","type":"uint256"},',
            '{"name":"answerSecs","type":"uint256"},{"name":"ruleSecs","type":"uint256"},',
            '{"name":"vault","type":"address"},{"name":"stake","type":"uint256"},{"name":"work","type":"Work"},',
            '{"name":"nonce","type":"uint256"}],'
        );
        types = string.concat(
            types,
            '"Work":[{"name":"capability","type":"string"},{"name":"schemas","type":"bytes32"},',
            '{"name":"task","type":"bytes32"},{"name":"pricing","type":"string"},{"name":"inputPrice","type":"uint256"},',
            '{"name":"cachedInputPrice","type":"uint256"},{"name":"outputPrice","type":"uint256"},',
            '{"name":"secondPrice","type":"uint256"},{"name":"inputMax","type":"uint256"},',
            '{"name":"outputMax","type":"uint256"},{"name":"quality","type":"uint256"},{"name":"model","type":"string"},',
            '{"name":"verification","type":"string"},{"name":"tokenizer","type":"string"},',
            '{"name":"settlement","type":"string"}]},"primaryType":"Terms","domain":{"name":"Coase JobEscrow",'
        );
        types = string.concat(
            types,
            '"version":"1","chainId":"',
            vm.toString(block.chainid),
            '","verifyingContract":"',
            vm.toString(address(escrow)),
            '"},"message":{"work":{"capability":"summarise","schemas":"',
            vm.toString(bytes32(uint256(1))),
            '","task":"',
            vm.toString(bytes32(uint256(2)))
        );
        types = string.concat(
            types,
            '","pricing":"metered","inputPrice":"3","cachedInputPrice":"4","outputPrice":"5","secondPrice":"6",',
            '"inputMax":"7","outputMax":"8","quality":"9","model":"a-model","verification":"schema",',
            '"tokenizer":"bytes","settlement":"escrow"}',
            _pair("buyer", vm.toString(t.buyer)),
            _pair("seller", vm.toString(t.seller)),
            _pair("asset", vm.toString(t.asset)),
            _pair("price", vm.toString(t.price)),
            _pair("arbiter", vm.toString(t.arbiter))
        );
        types = string.concat(
            types,
            _pair("bond", vm.toString(t.bond)),
            _pair("defaultToSeller", vm.toString(t.defaultToSeller)),
            _pair("lockBy", vm.toString(t.lockBy)),
            _pair("deliverBy", vm.toString(t.deliverBy)),
            _pair("disputeSecs", vm.toString(t.disputeSecs)),
            _pair("answerSecs", vm.toString(t.answerSecs))
        );
        return string.concat(
            types,
            _pair("ruleSecs", vm.toString(t.ruleSecs)),
            _pair("vault", vm.toString(t.vault)),
            _pair("stake", vm.toString(t.stake)),
            _pair("nonce", vm.toString(t.nonce)),
            "}}"
        );
    }

    function _pair(string memory key, string memory value) private pure returns (string memory) {
        return string.concat(',"', key, '":"', value, '"');
    }
}
